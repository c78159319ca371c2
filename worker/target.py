"""From TARGET to an AgentServer.

TARGET is `path.py`, `path.py:attr`, `module:attr` or `-m module`. A bare path is executed as
`python path.py start` would execute it: the module is `__main__`, and a stand-in for `run_app` records the
agent. So the usual file, which builds its WorkerOptions under the `__main__` guard, works as it is. A path
with an attribute is executed as `__mp_main__`, the name under which multiprocessing imports the file in job
processes, so its `__main__` guard
stays shut. `-m module` is run as `python -m module start` would run it.

The program finds `start` and the arguments that follow `--args` in `sys.argv`. Where `start` is among those
arguments they are left as they are, for a program that expects `start` in another place.

The user's directory joins `sys.path` only here, when lastcall has imported its dependencies. A `uvloop.py`
beside the target would otherwise take the place of uvloop in lastcall's imports.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import stat
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn  # Any: a user's object, or an AgentServer, which only `sdk` knows
from urllib.parse import urlsplit

from lastcall.worker.base import target_form
from lastcall.worker.base.dial_checks import check_url
from lastcall.worker.base.errors import StartError, TargetError
from lastcall.worker.base.exit_codes import Exit


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A parsed TARGET. `path` is None for a module, `module` is "" for a path, `attribute` may be ""."""

    text: str
    path: Path | None
    module: str
    attribute: str
    arguments: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """The arguments that follow the name of the program."""
        return [*(() if "start" in self.arguments else ("start",)), *self.arguments]


def parse(text: str, arguments: Sequence[str] = ()) -> Target:
    """Parse a TARGET. Raises TargetError for a text of no known form, and where the file is missing."""
    try:
        form = target_form.parse(text)
    except ValueError as error:
        raise TargetError(str(error)) from None
    if not form.file:
        return Target(
            text=text,
            path=None,
            module=form.module,
            attribute=form.attribute,
            arguments=tuple(arguments),
        )
    path = Path(form.file) if os.path.isabs(form.file) else _from_here(text) / form.file
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except OSError as error:  # a directory that may not be looked into, too long a name, a loop of links
        raise TargetError(f"{form.file!r} can't be read: {error.strerror}") from None
    if not is_file:
        raise TargetError(f"no file {form.file!r}: TARGET is {target_form.FORMS}{_near(path)}")
    return Target(text=text, path=path, module="", attribute=form.attribute, arguments=tuple(arguments))


def parts_of(text: str) -> Callable[[str, str], bool]:
    """Return a function that tells by name and file whether a module is one of the program of a TARGET.

    The program may be an installed package too. A TARGET that can't be loaded, as from a working directory
    that is gone, has no modules.
    """
    try:
        form = target_form.parse(text)
        folder = os.path.dirname(os.path.realpath(form.file)) if form.file else ""
    except (ValueError, OSError):
        return lambda name, file: False
    top = form.module.partition(".")[0]
    # The environment of an agent may be below its directory, so a directory counts only inside of that.
    inside = f"{folder}{os.sep}" if not target_form.INSTALLED.isdisjoint(folder.split(os.sep)) else ""
    return lambda name, file: name.partition(".")[0] == top or (bool(inside) and file.startswith(inside))


def _from_here(text: str) -> Path:
    """Return the working directory. Raises TargetError when somebody has removed it."""
    try:
        return Path.cwd()
    except OSError as error:
        raise TargetError(
            f"{text}: the working directory is gone ({error.strerror}): start in one that exists,"
            " or name the file by its full path"
        ) from None


def load(
    target: Target,
    *,
    record: Callable[[Callable[[Any], NoReturn]], None],
    refuse_to_run: Callable[[Callable[[Any], NoReturn]], Callable[[Any], None]],
    classify: Callable[[object], Any | None],
) -> Any:
    """Run or import the target and return its AgentServer.

    `record` installs a stand-in for livekit's `run_app`, and `refuse_to_run` one for the run of a server. A
    target that runs its server itself would take calls of which lastcall knows nothing, and which would end
    with the worker. Only the server that is returned may run. `classify` turns an AgentServer or
    WorkerOptions into an AgentServer, and any other object into None. Raises TargetError for a target that
    no retry can help: a missing attribute or module, an attribute of a wrong type, a syntax error. Raises
    StartError for any other exception of the user's code.
    """
    ran: list[str] = []

    def refuse(_server: Any) -> NoReturn:
        ran.append(_place_of(sys._getframe(2)))
        raise SystemExit(Exit.CONFIG)  # `except Exception` lets it pass, and a thread ends by it silently

    permit = refuse_to_run(refuse)
    try:
        server = _load(target, record=record, classify=classify)
    except (TargetError, StartError):
        if not ran:
            raise
    if ran:
        raise TargetError(
            f"{target.text} runs its server itself{ran[0]}, so no stop could wait for its calls:"
            f" end with cli.run_app(server), or name the server, as in {_file_of(target)}:server"
        )
    permit(server)
    return server


def _place_of(frame: types.FrameType | None) -> str:
    """Return the innermost place outside of livekit-agents and the standard library, for a message."""
    library = os.path.dirname(os.__file__)
    while frame is not None:
        filename = frame.f_code.co_filename
        in_library = filename.startswith(library) and "site-packages" not in filename
        if not in_library and IN_LIVEKIT_AGENTS not in filename:
            return f" ({filename} line {frame.f_lineno})"
        frame = frame.f_back
    return ""


def _file_of(target: Target) -> str:
    return target.text.removesuffix(f":{target.attribute}") if target.attribute else target.text


def _load(
    target: Target,
    *,
    record: Callable[[Callable[[Any], NoReturn]], None],
    classify: Callable[[object], Any | None],
) -> Any:
    recorded: list[Any] = []

    def run_app(server: Any) -> NoReturn:
        recorded.append(server)
        raise SystemExit(0)

    record(run_app)
    if target.path is not None:
        # As Python does, whose path begins at the script itself, and not at a link to the script.
        directory = target.path.resolve().parent
        _refuse_own_lastcall(directory)
        sys.path.insert(0, str(directory))
        module = _execute(target, target.path, recorded)
    else:
        directory = _from_here(target.text)
        _refuse_own_lastcall(directory)
        sys.path.insert(0, str(directory))
        module = _import(target) if target.attribute else _execute_module(target, recorded)
    if target.attribute:
        found = _attribute(target, module)
        server = classify(found)
        if server is None and callable(found):
            server = classify(_call(target, found))
        if server is None:
            raise TargetError(
                f"{target.text}: {target.attribute!r} is a {type(found).__name__},"
                " expected an AgentServer, WorkerOptions, or a function that returns one"
            )
        return server
    if recorded:
        server = classify(recorded[-1])
        if server is None:
            raise TargetError(
                f"{target.text}: run_app was given a {type(recorded[-1]).__name__},"
                " expected an AgentServer or WorkerOptions"
            )
        return server
    return _only_server(target, module, classify)


def check_server_url(text: str, url: str) -> None:
    """Refuse a server object with a URL that livekit-agents could only try in vain, again and again.

    Raises TargetError. The environment alone does not decide, because the program of the target may set
    another URL.
    """
    if not url:
        return
    try:
        check_url(url, ("http", "https", "ws", "wss"))
    except ValueError as error:
        source = "LIVEKIT_URL" if os.environ.get("LIVEKIT_URL") == url else "the ws_url of its server"
        _, at, rest = url.rpartition("@")
        shown = f"…@{rest}" if at else rest
        raise TargetError(f"{text}: {source}: got {shown!r}, {error}") from None


def check_server_is_known(text: str, missing: list[str]) -> None:
    """Refuse a server object without a URL or a key, with which livekit-agents ends at each start.

    `missing` are the variables that would have given them. Raises TargetError.
    """
    if missing:
        raise TargetError(
            f"{text}: got no {', '.join(missing)}, expected the LiveKit server and its key: set them in"
            " the environment or in env_file, as for python agent.py start; lastcall dev needs none"
        )


def address_of(url: str) -> str:
    """Return the part of a LiveKit server's URL that says where it is, without credentials; "" for no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{url.partition('@')[2] or url!r} ({error})"
    if not parts.scheme and not parts.netloc and not parts.path:
        return ""
    # As livekit-agents does, which takes http for ws.
    scheme = re.sub("^http", "ws", parts.scheme)
    return f"{scheme}://{parts.hostname}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def _only_server(target: Target, module: types.ModuleType, classify: Callable[[object], Any | None]) -> Any:
    """Return the one server that a file without `run_app` defines, as livekit-agents' command line does.

    Raises TargetError where the file defines none, or several.
    """
    servers = {name: found for name, value in vars(module).items() if (found := classify(value)) is not None}
    if len({id(server) for server in servers.values()}) == 1:
        return next(iter(servers.values()))
    names = ", ".join(sorted(servers)) or "none"
    raise TargetError(
        f"{target.text} never called cli.run_app and defines {names} at its top level:"
        f" name one AgentServer or WorkerOptions as {target.text}:NAME"
    )


def _execute(target: Target, path: Path, recorded: list[Any]) -> types.ModuleType:
    name = "__mp_main__" if target.attribute else "__main__"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    module.__dict__["__cached__"] = None
    # For what reads the program's source or data through it: inspect, pkgutil.
    module.__loader__ = SourceFileLoader(name, str(path))
    # multiprocessing reads the file of `__main__` to tell job processes what to import, so the module is
    # registered under that name with an attribute too.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    sys.argv = [_file_of(target), *target.argv]
    _run_code(target, module, lambda: _compile(target, path), recorded)
    return module


def _execute_module(target: Target, recorded: list[Any]) -> types.ModuleType:
    """Run a module as `python -m` does. Raises TargetError where there is none."""
    sys.argv = ["-m", *target.argv]  # as Python has it while it looks for the module
    spec = _spec_of(target, target.module)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _spec_of(target, f"{target.module}.__main__")
    loader = None if spec is None else spec.loader
    if spec is None or not isinstance(loader, InspectLoader):
        raise TargetError(
            f"{target.text}: there is no such module; correct the name or the working directory"
        )
    module = types.ModuleType("__main__")
    # Job processes import the module by the name in its spec.
    module.__spec__ = spec
    module.__package__ = spec.parent
    module.__loader__ = loader
    module.__file__ = spec.origin
    module.__dict__["__cached__"] = spec.cached
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    sys.argv = [spec.origin or target.module, *target.argv]
    _run_code(target, module, lambda: loader.get_code(spec.name), recorded)
    return module


def _spec_of(target: Target, name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and name.startswith(f"{error.name}."):
            return None
        _raise_users(target, error)


def _run_code(target: Target, module: types.ModuleType, code: Callable[[], Any], recorded: list[Any]) -> None:
    try:
        exec(code(), module.__dict__)
    except SystemExit as error:
        if not recorded:
            raise StartError(
                f"{target.text} exited with {error.code!r} before it gave run_app an agent"
            ) from None
    except BaseException as error:
        _raise_users(target, error)


def _compile(target: Target, path: Path) -> types.CodeType:
    """Return the code of a file. Raises TargetError where the file can't be read, SyntaxError."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise TargetError(f"{target.text!r} can't be read: {error.strerror}") from None
    # Not with the __future__ imports of this file: they would change what the program's annotations are.
    return compile(source, str(path), "exec", dont_inherit=True)


def _import(target: Target) -> types.ModuleType:
    sys.argv = [target.module, *target.argv]
    try:
        return importlib.import_module(target.module)
    except SystemExit as error:
        raise StartError(f"{target.text} exited with {error.code!r} while it was imported") from None
    except BaseException as error:
        _raise_users(target, error)


def _call(target: Target, factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except BaseException as error:
        _raise_users(target, error)


def _attribute(target: Target, module: types.ModuleType) -> Any:
    try:
        return getattr(module, target.attribute)
    except AttributeError:
        names = [name for name in vars(module) if not name.startswith("_")]
        near = difflib.get_close_matches(target.attribute, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TargetError(f"{target.text}: no attribute {target.attribute!r} there{hint}") from None


def _raise_users(target: Target, error: BaseException) -> NoReturn:
    """Turn an exception of the user's code into a TargetError or a StartError, and raise that."""
    if isinstance(error, TargetError):
        raise error
    if isinstance(error, SyntaxError):
        where = f"{error.filename} line {error.lineno}"
        raise TargetError(f"{target.text}: {type(error).__name__} in {where}: {error.msg}") from None
    if isinstance(error, ImportError):
        said = " ".join(str(error).split())  # numpy, for one, writes a page
        raise TargetError(f"{target.text}: {said}{_where(error)}; {_remedy(error)}") from None
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    raise StartError(f"{target.text} failed to load: {text}", traceback=users_traceback(error)) from None


def _remedy(error: ImportError) -> str:
    """Return the advice for a failed import; for a plugin of livekit-agents the name of its package."""
    plugin = _missing_plugin(error)
    if plugin:
        return f"install livekit-plugins-{plugin.replace('_', '-')} or correct the name"
    if "relative import with no known parent" in str(error):
        return "run the file as a module of its package, as in -m package.module"
    if isinstance(error, ModuleNotFoundError):
        return "install it or correct the name"
    return "install a version that has it, or correct the name"


def _missing_plugin(error: ImportError) -> str:
    """Return the name of the plugin that an import asked for in vain; "" for any other import.

    Where at least one plugin is installed, `livekit.plugins` is a namespace, and the missing name is an
    ImportError. Where none is, the error names `livekit.plugins` alone, and the statement names the plugin.
    """
    name = error.name or ""
    if name.startswith(f"{PLUGINS}."):
        return name.removeprefix(f"{PLUGINS}.").partition(".")[0] if _is_missing(error) else ""
    if name != PLUGINS:
        return ""
    if not isinstance(error, ModuleNotFoundError):
        found = re.match(r"cannot import name '(\w+)'", str(error))
        return found[1] if found else ""
    for frame in traceback.extract_tb(_users_part(error.__traceback__)):
        found = re.search(r"livekit\.plugins(?: +import +\(?|\.)(\w+)", frame.line or "")
        if found:
            return found[1]
    return ""


def _is_missing(error: ImportError) -> bool:
    """Tell whether a plugin is not there, and not a name or a module in it."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").count(".") == PLUGINS.count(".") + 1


def _where(error: BaseException) -> str:
    """Return the last place in files, user's or installed, that the error passed; "" where there is none."""
    frames = traceback.extract_tb(_users_part(error.__traceback__))
    in_files = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    return f" ({in_files[-1].filename} line {in_files[-1].lineno})" if in_files else ""


# The package whose modules are installed one by one, each as livekit-plugins-NAME.
PLUGINS = "livekit.plugins"
# Part of the path of each file of livekit-agents.
IN_LIVEKIT_AGENTS = f"{os.sep}livekit{os.sep}agents{os.sep}"


def _users_part(tb: types.TracebackType | None) -> types.TracebackType | None:
    """Return the traceback from the user's first frame on; None where no frame is the user's.

    Frames of lastcall, livekit-agents and the import system are not the user's.
    """
    in_lastcall = str(Path(__file__).parent)
    while tb is not None:
        filename = tb.tb_frame.f_code.co_filename
        foreign = filename.startswith((in_lastcall, "<frozen")) or filename == importlib.__file__
        if not foreign and IN_LIVEKIT_AGENTS not in filename:
            return tb
        tb = tb.tb_next
    return None


def users_traceback(error: BaseException) -> str:
    """Format an error with its frames from the user's file on; return "" where no frame is the user's."""
    part = _users_part(error.__traceback__)
    if part is None:
        return ""
    return "".join(traceback.format_exception(type(error), error, part))


def _refuse_own_lastcall(directory: Path) -> None:
    """Refuse a user's directory that has a module named lastcall: `import lastcall` could not reach it.

    Raises TargetError. A folder `lastcall` without an `__init__.py` is no package and hides nothing. In a
    checkout of lastcall the folder is this package.
    """
    module, package = directory / "lastcall.py", directory / "lastcall"
    if not module.is_file():
        if not (package / "__init__.py").is_file() or (package / "worker" / "target.py").is_file():
            return
        module = package
    raise TargetError(
        f"{module} has the name of the supervisor's own package, so `import lastcall` could not reach it:"
        f" rename {module.name!r}"
    )


def _near(path: Path) -> str:
    """Return a hint at a file of a similar name in the same directory; "" where there is none."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".py"]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
