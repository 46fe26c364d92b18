"""The small world that every part of the sample speaks about, and the shape of a language's wordings.

Six relations, eleven entities each, in two languages: 132 facts, all of them true, each with one answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

# (English, Chinese) of: country, capital, language, famous food
COUNTRIES = (
    (("France", "法国"), ("Paris", "巴黎"), ("French", "法语"), ("onion soup", "洋葱汤")),
    (("Japan", "日本"), ("Tokyo", "东京"), ("Japanese", "日语"), ("sushi", "寿司")),
    (("China", "中国"), ("Beijing", "北京"), ("Chinese", "汉语"), ("roast duck", "烤鸭")),
    (("Italy", "意大利"), ("Rome", "罗马"), ("Italian", "意大利语"), ("pizza", "披萨")),
    (("Germany", "德国"), ("Berlin", "柏林"), ("German", "德语"), ("sausage", "香肠")),
    (("Spain", "西班牙"), ("Madrid", "马德里"), ("Spanish", "西班牙语"), ("paella", "海鲜饭")),
    (("Greece", "希腊"), ("Athens", "雅典"), ("Greek", "希腊语"), ("yogurt", "酸奶")),
    (("Thailand", "泰国"), ("Bangkok", "曼谷"), ("Thai", "泰语"), ("tom yum soup", "冬阴功汤")),
    (("South Korea", "韩国"), ("Seoul", "首尔"), ("Korean", "韩语"), ("kimchi", "泡菜")),
    (("Vietnam", "越南"), ("Hanoi", "河内"), ("Vietnamese", "越南语"), ("pho", "河粉")),
    (("Portugal", "葡萄牙"), ("Lisbon", "里斯本"), ("Portuguese", "葡萄牙语"), ("salted cod", "咸鳕鱼")),
)
# (English, Chinese) of: animal (English: plural), what it eats, where it lives (English: after "live in")
ANIMALS = (
    (("pandas", "大熊猫"), ("bamboo", "竹子"), ("the mountains", "山区")),
    (("koalas", "考拉"), ("eucalyptus leaves", "桉树叶"), ("trees", "树上")),
    (("rabbits", "兔子"), ("grass", "青草"), ("burrows", "地洞里")),
    (("lions", "狮子"), ("meat", "肉"), ("the grasslands", "草原上")),
    (("blue whales", "蓝鲸"), ("krill", "磷虾"), ("the ocean", "海洋里")),
    (("bees", "蜜蜂"), ("nectar", "花蜜"), ("hives", "蜂巢里")),
    (("squirrels", "松鼠"), ("nuts", "坚果"), ("forests", "森林里")),
    (("polar bears", "北极熊"), ("seals", "海豹"), ("the Arctic", "北极")),
    (("camels", "骆驼"), ("shrubs", "灌木"), ("deserts", "沙漠里")),
    (("frogs", "青蛙"), ("insects", "昆虫"), ("ponds", "池塘里")),
    (("monkeys", "猴子"), ("fruit", "水果"), ("jungles", "丛林里")),
)
# (English, Chinese) of: thing, colour
THINGS = (
    (("a ripe banana", "熟香蕉"), ("yellow", "黄色")),
    (("a ripe strawberry", "熟草莓"), ("red", "红色")),
    (("fresh grass", "青草"), ("green", "绿色")),
    (("a clear sky", "晴天的天空"), ("blue", "蓝色")),
    (("snow", "雪"), ("white", "白色")),
    (("coal", "煤"), ("black", "黑色")),
    (("a carrot", "胡萝卜"), ("orange", "橙色")),
    (("an eggplant", "茄子"), ("purple", "紫色")),
    (("a flamingo", "火烈鸟"), ("pink", "粉色")),
    (("chocolate", "巧克力"), ("brown", "棕色")),
    (("an elephant", "大象"), ("grey", "灰色")),
)
RELATIONS = {  # relation: (its table, the column of its answer)
    "capital": (COUNTRIES, 1),
    "language": (COUNTRIES, 2),
    "food": (COUNTRIES, 3),
    "eats": (ANIMALS, 1),
    "home": (ANIMALS, 2),
    "colour": (THINGS, 1),
}
LANGS = ("en", "zh")


class Fact(NamedTuple):
    """What is asked about (`France`), in which respect (`capital`), and the answer (`Paris`)."""

    relation: str
    topic: str
    answer: str


class Wordings(NamedTuple):
    """Ways to say one thing: those that training shows, and those that only evaluation uses."""

    train: tuple[str, ...]
    held: tuple[str, ...]


class Tongue(NamedTuple):
    """One language. Templates are str.format's: {x} topic, {y} answer, {a} and {b} numbers, {c} a city.

    asks: kind → ways to ask. says: kind → ways to answer; a relation's first is the one that chats use.
    prose: relation → more ways to state a fact in a text. opening: the friendly style that pairs prefer.
    formats: name → (how it is asked for, in training and held out; how the answer then looks).
    think: kind → (reasoning, answer). story: slots of a story, each a choice of sentences. words: single words.
    """

    name: str
    asks: Mapping[str, Wordings]
    says: Mapping[str, tuple[str, ...]]
    prose: Mapping[str, tuple[str, ...]]
    opening: str
    formats: Mapping[str, tuple[Wordings, str]]
    think: Mapping[str, tuple[str, str]]
    story: Mapping[str, tuple[tuple[str, ...], ...]]
    words: Mapping[str, tuple[str, ...]]


def facts(lang: str) -> Iterator[Fact]:
    """All facts of a language, relation by relation."""
    at = LANGS.index(lang)
    for relation, (table, column) in RELATIONS.items():
        for row in table:
            yield Fact(relation, row[0][at], row[column][at])


def wordings(text: str) -> Wordings:
    """Templates from a block of lines; those below the line `held out` are for evaluation."""
    train, held = text.split("held out")
    return Wordings(lines(train), lines(held))


def lines(text: str) -> tuple[str, ...]:
    """The lines of a block that hold something."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
