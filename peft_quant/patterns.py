"""Regular expressions in an adapter's configuration, which strangers write and PEFT matches with names of modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any


try:
    from re import _compiler, _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_parse as _parser


_MOST_STEPS = 3_000_000  # counting them takes a second, taking them less
_LONGEST = 50_000  # characters of all patterns together
_ALWAYS_ACCEPTED = 1_000
_OF_AN_EMPTY_REPETITION = 50  # steps, as there may be any number of them
_MOST_PAIRS = 2_000_000  # of a pattern and a name
_PLAIN_NAME = re.compile(r"(?:[\w.^$-]|\\\.)*")  # as a regular expression it has one way to match
_KEYS = ("rank_pattern", "alpha_pattern")
_KEY = r"(.*\.)?({})$"
_AS_PEFT_MATCHES = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    **dict.fromkeys(_KEYS, _KEY),
}
_ARE_NAMES_AS_LISTS = ("target_modules", "exclude_modules")


def require_quick_patterns(options: Mapping[str, Any], names: Iterable[str]) -> None:
    r"""Check that an adapter's patterns can be matched with the names of a model's modules in about a second.

    Python matches a regular expression by trying one way after the other, and nothing interrupts it. In
    `(([a-z]+)+)+!`, the number of ways doubles with each letter. Here these are counted without being tried.

    Args:
        options: the configuration's options by name; others than those that hold patterns are ignored.
        names: names of the modules.

    Raises:
        ValueError: naming the option and the pattern: it would take more than three million steps, is not a regular
            expression, or has a back reference, whose steps cannot be counted; or there are more entries than modules.
    """
    names = list(names)
    entries = {option: _entries(options.get(option)) for option in _AS_PEFT_MATCHES}
    for option, found in entries.items():
        if len(found) > max(_ALWAYS_ACCEPTED, len(names)):
            raise ValueError(
                f"{option} has {len(found)} entries, more than there are modules ({len(names)}): name endings, such "
                "as q_proj, or use a regular expression."
            )
        if option in _KEYS and len(found) * len(names) > _MOST_PAIRS:
            raise ValueError(
                f"{option} has {len(found)} entries for {len(names)} modules, which take too long to match: use "
                "regular expressions that match several modules each."
            )
    patterns = [
        (option, pattern)
        for option, found in entries.items()
        if option not in _ARE_NAMES_AS_LISTS or isinstance(options.get(option), str)
        for pattern in found
        if not _PLAIN_NAME.fullmatch(pattern)
    ]
    if sum(len(pattern) for _, pattern in patterns) > _LONGEST:
        raise ValueError(
            f"{patterns[0][0]} and others have regular expressions of more than {_LONGEST} characters: shorten them."
        )
    shapes = {re.sub("[0-9]", "0", name) for name in names}  # which have the steps of all their numbers, or more
    steps = 0
    for option, pattern in patterns:
        try:
            expression = _AS_PEFT_MATCHES[option].format(pattern)
            re.compile(expression)
            counter = _Steps(expression, steps)
            for name in shapes:
                counter.count(name)
            steps = counter.taken
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{option} has {pattern!r:.200}, which cannot be used as a regular expression: {error}."
            ) from error
        except _TooManyStepsError as error:
            raise ValueError(
                f"{option} has the regular expression {pattern!r:.200}, which may take too long to match with {name}: "
                "its repetitions are nested, or next to each other. Write it with fewer, such as one `.*`, or list "
                "the endings of the names."
            ) from error


def matching_key(patterns: Iterable[str], name: str) -> str | None:
    """The first key of a `rank_pattern` or `alpha_pattern` that matches a layer's name; None if there is none."""
    return next((key for key in patterns if _compiled(key).match(name)), None)


@lru_cache(maxsize=4 * _ALWAYS_ACCEPTED)  # the cache of `re` is smaller
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(_KEY.format(key))


def _entries(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(map(str, value or ()))


class _TooManyStepsError(Exception):
    """More steps than can be waited for."""


class _Steps:
    """An upper bound of the steps that a backtracking matcher takes for names, whose digits stand for any digits.

    Positions in a name are mapped to the number of ways to reach them. A step is one of these ways at one element.

    Args:
        pattern: the regular expression.
        taken: steps taken for other patterns before.
    """

    def __init__(self, pattern: str, taken: int) -> None:
        self.taken = taken
        self._tree = _parser.parse(pattern)
        self._accepted: dict[tuple[int, str], bool] = {}

    def count(self, name: str) -> None:
        """Add the steps to try all ways to match a name.

        Raises:
            _TooManyStepsError: they are more than can be waited for.
        """
        self._name = name
        self._sequence(self._tree, {0: 1})

    def _sequence(self, elements: Any, ways: dict[int, int]) -> dict[int, int]:
        for element in elements:
            self.taken += sum(ways.values())
            if self.taken > _MOST_STEPS:
                raise _TooManyStepsError
            ways = self._element(element, ways)
        return ways

    def _element(self, element: Any, ways: dict[int, int]) -> dict[int, int]:
        kind, content = element[0].name, element[1]
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return {position + 1: count for position, count in ways.items() if self._accepts(element, position)}
        if kind == "BRANCH":
            return _sum(self._sequence(branch, ways) for branch in content[1])
        if kind == "SUBPATTERN":
            return self._sequence(content[-1], ways)
        if kind == "ATOMIC_GROUP":
            return self._sequence(content, ways)
        if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, repeated = content
            return self._repeat(least, most, repeated, ways)
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, asserted = content
            back = asserted.getwidth()[0] if direction < 0 else 0
            self._sequence(asserted, {position - back: count for position, count in ways.items() if position >= back})
            return ways
        if kind in ("AT", "FAILURE"):
            return ways
        raise re.error("its back reference is not supported")

    def _repeat(self, least: int, most: int, content: Any, ways: dict[int, int]) -> dict[int, int]:
        reached = [ways] if least == 0 else []
        for number in range(1, most + 1):
            if content.getwidth()[0]:
                ways = self._sequence(content, ways)
            else:
                self.taken += _OF_AN_EMPTY_REPETITION
                each = [(position, self._sequence(content, {position: count})) for position, count in ways.items()]
                if number > least:  # an empty repetition that is not needed is the last
                    reached += [{position: found.pop(position)} for position, found in each if position in found]
                ways = _sum(found for _, found in each)
            if not ways:
                break
            if number >= least:
                reached.append(ways)
        return _sum(reached)

    def _accepts(self, element: Any, position: int) -> bool:
        letter = self._name[position : position + 1]
        key = id(element), letter
        if key not in self._accepted:
            letters = "0123456789" if letter == "0" else letter
            item = _parser.SubPattern(_parser.State(), [element])
            expressions = [_compiler.compile(item, flags) for flags in (re.DOTALL, re.DOTALL | re.IGNORECASE)]
            self._accepted[key] = any(each.match(one) for each in expressions for one in letters)
        return self._accepted[key]


def _sum(ways: Iterable[dict[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for each in ways:
        for position, count in each.items():
            total[position] = total.get(position, 0) + count
    return total
