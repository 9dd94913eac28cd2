"""Arguments of the commands that take a config file and overrides of its fields."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mm_jax.errors import UserError

TOGETHER = (
    "coordinator",
    "processes",
    "process-id",
    "start-timeout",
)  # options of commands that many processes share


@dataclass(frozen=True)
class Arguments:
    """The config file, the command's own options and flags, and what is left for the config's fields."""

    path: str
    options: dict[str, str]
    flags: frozenset[str]
    rest: tuple[str, ...]


def split_arguments(
    argv: Sequence[str], help_text: str, options: tuple[str, ...] = (), flags: tuple[str, ...] = ()
) -> Arguments | None:
    """The arguments of a command, or None after printing its help.

    >>> split_arguments(["c.py", "--run=x", "--seed", "1"], "", options=("run",)).rest
    ('--seed', '1')

    Raises:
        UserError: no config file, or an option without its value.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(help_text)
        return None
    path, found, seen, rest = "", {}, set(), []
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        name, equals, value = argument.partition("=")
        if name.removeprefix("--") in flags and name.startswith("--"):
            seen.add(name[2:])
        elif name.startswith("--") and name[2:] in options:
            if not equals and not pending:
                raise UserError(f"{name} needs a value")
            found[name[2:]] = value if equals else pending.pop(0)
        elif not path and not argument.startswith("-") and not rest:
            path = argument
        else:
            rest.append(argument)
    if not path:
        raise UserError("a config file is needed, such as configs/quickstart.py")
    return Arguments(path, found, frozenset(seen), tuple(rest))


@contextmanager
def together(options: Mapping[str, str]) -> Iterator[None]:
    """Within `with`, this process is one of those that the options `TOGETHER` or its environment name.

    What ends one of them before its time ends all.

    Raises:
        UserError: some processes have not come; they are named.
    """
    from mm_jax.parallel import processes

    timeout = options.get("start-timeout", "300")
    if not timeout.isdigit() or not int(timeout):
        raise UserError(f"--start-timeout is {timeout}; whole seconds are needed")
    place = processes.find_place(*(options.get(name, "") for name in TOGETHER[:3]))
    if place is None:
        yield
        return
    processes.join(place, float(timeout))
    try:
        yield
    except UserError as error:
        processes.abandon(str(error), 2)
    except BaseException as error:
        traceback.print_exc()
        processes.abandon(repr(error), 1)
