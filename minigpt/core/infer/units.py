"""Units of measure and what they are worth: a table, and conversion within a kind."""

from __future__ import annotations

import difflib
from fractions import Fraction
from typing import NamedTuple

# Kind → names of a unit, the symbol first → its value in the kind's first unit. Exact by definition where there is one.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "m|metre|meter|米": "1", "km|kilometre|kilometer|公里|千米": "1000", "dm|decimetre|decimeter|分米": "1/10",
        "cm|centimetre|centimeter|厘米": "1/100", "mm|millimetre|millimeter|毫米": "1/1000",
        "μm|µm|um|micrometre|micrometer|micron|微米": "1e-6", "nm|nanometre|nanometer|纳米": "1e-9",
        "mi|mile|英里": "1609.344", "yd|yard|码": "0.9144", "ft|foot|feet|英尺": "0.3048", "in|inch|英寸": "0.0254",
        "nmi|nautical mile|海里": "1852", "里|市里": "500", "尺|市尺": "1/3", "寸|市寸": "1/30",
        "au|astronomical unit": "149597870700", "ly|light year|光年": "9460730472580800",
    },
    "area": {
        "m²|m2|m^2|square metre|square meter|sqm|平方米": "1",
        "km²|km2|km^2|square kilometre|square kilometer|平方公里|平方千米": "1e6",
        "cm²|cm2|cm^2|square centimetre|square centimeter|平方厘米": "1e-4",
        "ha|hectare|公顷": "10000", "亩|mu": "2000/3", "acre|ac|英亩": "4046.8564224",
        "ft²|ft2|ft^2|square foot|square feet|sqft|平方英尺": "0.09290304",
        "in²|in2|in^2|square inch|平方英寸": "0.00064516", "mi²|mi2|square mile|平方英里": "2589988.110336",
    },
    "volume": {
        "L|l|litre|liter|升": "1", "mL|ml|millilitre|milliliter|毫升": "1/1000",
        "m³|m3|m^3|cubic metre|cubic meter|立方米": "1000",
        "cm³|cm3|cm^3|cc|cubic centimetre|cubic centimeter|立方厘米": "1/1000",
        "gal|gallon|us gallon|加仑": "3.785411784", "imperial gallon|uk gallon|英制加仑": "4.54609",
        "qt|quart": "0.946352946", "pt|pint|品脱": "0.473176473", "cup|杯": "0.2365882365",
        "fl oz|fluid ounce|液量盎司": "0.0295735295625", "tbsp|tablespoon": "0.01478676478125",
        "tsp|teaspoon": "0.00492892159375",
    },
    "mass": {
        "kg|kilogram|kilo|千克|公斤": "1", "g|gram|克": "1/1000", "mg|milligram|毫克": "1e-6",
        "μg|µg|ug|microgram|微克": "1e-9", "t|tonne|metric ton|吨": "1000", "lb|lbs|pound|磅": "0.45359237",
        "oz|ounce|盎司": "0.028349523125", "st|stone|英石": "6.35029318", "short ton|us ton|短吨": "907.18474",
        "斤|市斤|jin": "1/2", "两|liang": "1/20", "ct|carat|克拉": "0.0002",
    },
    "time": {
        "s|sec|second|秒": "1", "ms|millisecond|毫秒": "1/1000", "μs|µs|us|microsecond|微秒": "1e-6",
        "ns|nanosecond|纳秒": "1e-9", "min|minute|分钟|分": "60", "h|hr|hour|小时": "3600", "d|day|天|日": "86400",
        "week|wk|周|星期": "604800", "year|yr|年": "31557600",
    },
    "speed": {
        "m/s|mps|米每秒": "1", "km/h|kmh|kph|公里每小时|千米每小时": "1000/3600", "mi/h|mph|英里每小时": "0.44704",
        "kn|kt|knot|节": "1852/3600", "ft/s|fps": "0.3048",
    },
    "data": {
        "B|byte|字节": "1", "kB|KB|kilobyte|千字节": "1e3", "MB|megabyte|兆字节": "1e6", "GB|gigabyte|吉字节": "1e9",
        "TB|terabyte": "1e12", "PB|petabyte": "1e15", "KiB|kibibyte": "1024", "MiB|mebibyte": "1048576",
        "GiB|gibibyte": "1073741824", "TiB|tebibyte": "1099511627776", "bit|b|比特": "1/8", "kbit|kilobit": "125",
        "Mbit|Mb|megabit": "125000", "Gbit|Gb|gigabit": "125000000",
    },
    "energy": {
        "J|joule|焦耳": "1", "kJ|kilojoule|千焦": "1000", "cal|calorie|卡路里|卡": "4.184",
        "kcal|kilocalorie|千卡|大卡": "4184", "Wh|watt hour|瓦时": "3600", "kWh|kilowatt hour|千瓦时|度电": "3600000",
    },
    "pressure": {
        "Pa|pascal|帕": "1", "kPa|kilopascal|千帕": "1000", "bar|巴": "100000", "atm|atmosphere|大气压": "101325",
        "mmHg|毫米汞柱": "133.322387415", "psi": "6894.757293168",
    },
    "angle": {"°|deg|degree|度": "1", "rad|radian|弧度": "57.29577951308232"},
}  # fmt: skip
# Kelvin = value × scale + shift
_TEMPERATURES = {
    "K|kelvin|开尔文|开": ("1", "0"),
    "°C|℃|C|celsius|centigrade|degree celsius|degrees celsius|摄氏度|摄氏": ("1", "273.15"),
    "°F|℉|F|fahrenheit|degree fahrenheit|degrees fahrenheit|华氏度|华氏": ("5/9", "45967/180"),
}


class Unit(NamedTuple):
    """value × scale + shift is the same in the first unit of the kind."""

    symbol: str
    kind: str
    scale: Fraction
    shift: Fraction = Fraction(0)


def _read_tables() -> tuple[dict[str, Unit], dict[str, Unit]]:
    """Units by name as it is written, and by name in small letters: Mb is no MB, but Km is a km."""
    exact: dict[str, Unit] = {}
    rows = [(names, kind, worth, "0") for kind, units in _TABLE.items() for names, worth in units.items()]
    rows += [(names, "temperature", scale, shift) for names, (scale, shift) in _TEMPERATURES.items()]
    for names, kind, scale, shift in rows:
        symbol, *others = names.split("|")
        unit = Unit(symbol, kind, Fraction(scale), Fraction(shift))
        for name in (symbol, *others):
            assert name not in exact, name
            exact[name] = unit
    small: dict[str, Unit] = {}
    for name, unit in exact.items():
        small.setdefault(name.casefold(), unit)
    return exact, small


_EXACT, _SMALL = _read_tables()


def find(name: str) -> Unit:
    """The unit of a symbol or name, in English or Chinese, singular or plural. ValueError names what is like it."""
    name = " ".join(name.replace("_", " ").split())
    if name in _EXACT:
        return _EXACT[name]
    folded = name.casefold()
    for candidate in (folded, folded.removesuffix("s"), folded.removesuffix("es")):  # metres, inches
        if candidate in _SMALL:
            return _SMALL[candidate]
    above, slash, below = folded.replace(" per ", "/").partition("/")
    if slash and (rate := f"{find(above).symbol}/{find(below).symbol}") in _EXACT:  # kilometres per hour
        return _EXACT[rate]
    near = difflib.get_close_matches(folded, _SMALL, n=3)
    raise ValueError(f"there is no unit {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))


def convert(value: Fraction, source: Unit, target: Unit) -> Fraction:
    """The same quantity in another unit. ValueError when it measures something else."""
    if source.kind != target.kind:
        raise ValueError(f"{source.symbol} measures {source.kind} and {target.symbol} {target.kind}")
    return (value * source.scale + source.shift - target.shift) / target.scale
