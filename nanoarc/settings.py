"""
what is asked of every setting, whether a flag, a TOML file, a checkpoint or python has set it.
"""
from dataclasses import fields
from numbers import Real

MOST = 2**31 # the bound of a setting that has none of its own. none is infinite: 0 says "all" or "off"
MAX_SEED = 2**64 - 1

def check_numbers(cfg, least={}, most={}):
    """
    every number of a config lies within its bounds, {name: bound}, or else 0 to MOST. nan never does. raises ValueError
    that names the setting
    """
    for f in fields(cfg):
        x = getattr(cfg, f.name)
        low, high = least.get(f.name, 0), most.get(f.name, MOST)
        numbers = x if isinstance(x, tuple) else [x]
        for number in numbers:
            if isinstance(number, Real) and not low <= number <= high:
                raise ValueError(f"{f.name}={x}: want {low} to {high}")

def is_like(x, default):
    """ may a value from a file stand where this default does? lists pass for tuples, integers for floats """
    if isinstance(default, tuple):
        return type(x) in (list, tuple) and all(is_like(y, default[0]) for y in x)
    return type(x) is type(default) or (type(x) is int and type(default) is float)

def differences(before, now, when='saved', at='now'):
    """ two dicts of settings -> list of what differs, as ["lr differs (saved 1, now 2)", ...] """
    wrong = []
    for name in {**before, **now}:
        x, y = before.get(name), now.get(name)
        if x != y:
            wrong.append(f"{name} differs ({when} {str(x)[:40]}, {at} {str(y)[:40]})")
    return wrong
