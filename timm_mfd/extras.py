"""What comes with the extras of the package, and what to say where one is missing."""

from importlib.util import find_spec

# By extra: the modules that are imported from it.
_MODULES = {
    "train": ("accelerate", "matplotlib", "psutil", "sklearn", "tqdm", "tyro"),
    "figures": ("matplotlib",),
}


def require(extra: str, what: str) -> None:
    """Refuse to go on without an extra.

    Args:
        extra: Its name in `pyproject.toml`.
        what: What needs it.

    Raises:
        ModuleNotFoundError: Naming what is missing, and what installs it.

    Example:
        >>> require("figures", "timm_mfd.figures")
    """
    if missing := [module for module in _MODULES[extra] if find_spec(module) is None]:
        install = f"pip install 'timm_mfd[{extra}]', or in a clone pip install -e '.[{extra}]'"
        raise ModuleNotFoundError(f"{what} needs {', '.join(missing)}: {install}", name=missing[0])
