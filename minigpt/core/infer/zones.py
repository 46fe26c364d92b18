"""Time zones by the names people give them: cities, in English or Chinese, and the names of the tz database."""

from __future__ import annotations

import difflib
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

# Cities that name no zone of the database
_CITIES = {
    "Asia/Shanghai": "Beijing|北京|Shenzhen|深圳|Guangzhou|广州|上海|重庆|China|中国",
    "Asia/Hong_Kong": "香港", "Asia/Macau": "澳门", "Asia/Taipei": "台北", "Asia/Singapore": "新加坡",
    "Asia/Tokyo": "东京|日本", "Asia/Seoul": "首尔|韩国", "Asia/Bangkok": "曼谷", "Asia/Ho_Chi_Minh": "Hanoi|河内",
    "Asia/Dubai": "迪拜",
    "Asia/Kolkata": "Delhi|New Delhi|Mumbai|Bangalore|新德里|孟买", "Europe/Paris": "巴黎", "Europe/London": "伦敦",
    "Europe/Rome": "罗马|Milan", "Europe/Berlin": "柏林|Munich|Frankfurt|Hamburg", "Europe/Madrid": "马德里|Barcelona",
    "Europe/Athens": "雅典", "Europe/Lisbon": "里斯本", "Europe/Moscow": "莫斯科", "Africa/Cairo": "开罗",
    "America/New_York": "纽约|Washington|华盛顿|Boston|波士顿|Miami", "America/Chicago": "芝加哥|Houston|Dallas",
    "America/Los_Angeles": "洛杉矶|San Francisco|旧金山|Seattle|西雅图|Las Vegas", "America/Toronto": "多伦多|Ottawa",
    "America/Vancouver": "温哥华", "America/Sao_Paulo": "Rio de Janeiro|圣保罗", "Australia/Sydney": "悉尼|Canberra",
}  # fmt: skip


def find(name: str) -> ZoneInfo:
    """The zone of a city or of that name. ValueError names one that is like it."""
    zones = _zones()
    wanted = _plain(name)
    for key in (wanted, wanted.partition(",")[0].strip(), wanted.rpartition("/")[2]):  # "Paris, France"
        if key in zones:
            return ZoneInfo(zones[key])
    near = difflib.get_close_matches(wanted, zones, n=1)
    meant = f"; did you mean {zones[near[0]]}?" if near else ", such as Asia/Shanghai"
    raise ValueError(f"there is no city or time zone {name!r}{meant}")


@lru_cache(maxsize=1)
def _zones() -> dict[str, str]:
    """Zone by its name and by its city."""
    known = sorted(available_timezones())
    found = {_plain(zone.rpartition("/")[2]): zone for zone in known}
    found |= {_plain(zone): zone for zone in known}
    return found | {
        _plain(city): zone for zone, cities in _CITIES.items() if zone in known for city in cities.split("|")
    }


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
