"""`--config FILE`: the options of a training, read from the YAML that an earlier run left in its folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from fastkd.data.files import write_text
from fastkd.data.yaml_text import load_yaml

_OF_ONE_CALL = {"config", "json", "resume", "overwrite", "help"}
"""What says how to run once, and so is neither written nor read."""


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Makes what the file says the defaults of this call, so that flags on the command line win."""
    if path is None or context.resilient_parsing:
        return path
    try:
        settings = load_yaml(path.read_text(encoding="utf-8"))
        if settings is not None:
            context.default_map = _checked(context, settings)
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise typer.BadParameter(f"{path}: {reason}") from None
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_read,
        is_eager=True,
        help="Read options from this YAML file, such as the one that an earlier run wrote to its folder; flags on "
        "the command line win.",
    ),
]


def _checked(context: typer.Context, settings: Any) -> dict[str, Any]:
    """The settings by the names of parameters.

    Raises:
        ValueError: no mapping, a key that the command does not have, or a value that no flag could take.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"got {type(settings).__name__}, expected lines such as learning-rate: 4.0e-05")
    parameters = {_key(parameter): parameter for parameter in context.command.params}
    defaults = {}
    for key, value in settings.items():
        if key in _OF_ONE_CALL:
            raise ValueError(f"{key}: belongs on the command line, as --{key}; remove the line")
        if key not in parameters:
            near = difflib.get_close_matches(str(key).replace("_", "-"), parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {context.command_path} --help"
            raise ValueError(f"{key}: {context.command_path} has no such option; {hint}")
        if value is None:
            continue
        many = isinstance(value, list) and getattr(parameters[key], "multiple", False)
        if not many and not isinstance(value, (str, int, float)):
            raise ValueError(f"{key}: got a {type(value).__name__}, expected one value as after --{key}")
        if isinstance(value, bool) and not getattr(parameters[key], "is_flag", False):
            raise ValueError(
                f"{key}: got {str(value).lower()}, expected a text or a number; quote a word such as 'yes'"
            )
        # what a shell would pass on
        defaults[parameters[key].name] = value if many or isinstance(value, bool) else str(value)
    return defaults


def _key(parameter: Any) -> str:
    """How the file calls a parameter: by its flag without dashes, or by the name of the argument."""
    if parameter.param_type_name == "argument":
        return str(parameter.name)
    return str(max(parameter.opts, key=len)).lstrip("-")


def write_config(context: typer.Context, folder: Path) -> Path:
    """Write the options of this call to COMMAND.yaml in the folder.

    Under a parity preset that is what the user gave, because everything given wins over the preset.
    """
    import yaml

    import fastkd_kernels

    has_preset = context.params.get("parity") is not None
    settings = {}
    for parameter in context.command.params:
        key, value = _key(parameter), context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        is_default = source is not None and source.name == "DEFAULT"
        if key in _OF_ONE_CALL or value is None or (has_preset and is_default):
            continue
        settings[key] = _plain(value)
    name = str(context.info_name)
    head = (
        f"# Options of this run, by fastkd {fastkd_kernels.__version__}. The same again, in another folder:\n"
        f"#   fastkd {name} --config {name}.yaml -o OTHER\n"
    )
    path = folder / f"{name}.yaml"
    write_text(path, head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    value = getattr(value, "value", value)
    return str(value) if isinstance(value, Path) else value
