"""Any `transformers` architecture from its configuration, with random weights. Needs the extra `transformers`."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from temper.config.schema import TransformersModel
from temper.errors import JobError, Problem
from temper.plan.facts import DataFacts
from temper.torchvision_import import declare_torchvision_operators


def build_transformers(config: TransformersModel, facts: DataFacts) -> nn.Module:
    """Build `auto_class` for the architecture `model_type`, its configuration's fields set by `args`.

    Fields that the data decide (`num_labels`; for images also `num_channels` and `image_size`) are filled in where the
    configuration has them and `args` leaves them out.
    """
    declare_torchvision_operators()
    try:
        import transformers
    except ImportError as error:
        remedy = "pip install 'temper[transformers]'"
        raise JobError(
            [Problem("model.kind", "transformers", f"needs a library that is missing ({error})", remedy)]
        ) from error
    if config.model_type not in transformers.CONFIG_MAPPING:
        close = difflib.get_close_matches(config.model_type, transformers.CONFIG_MAPPING, n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "see the architectures that transformers lists"
        raise JobError(
            [Problem("model.model_type", config.model_type, "is not an architecture of transformers", remedy)]
        )
    defaults = transformers.AutoConfig.for_model(config.model_type)
    _require_fields(config, defaults)
    settings = {**_from_data(config, facts, defaults), **config.args}
    try:
        architecture = transformers.AutoConfig.for_model(config.model_type, **settings)
        model: nn.Module = getattr(transformers, config.auto_class).from_config(architecture)
    except Exception as error:
        # Its configurations and models check their fields with exceptions of every kind.
        message = str(error).strip().partition("\n")[0]
        rule = f"do not give a {config.auto_class} ({type(error).__name__}: {message})"
        remedy = "see the architecture's configuration in transformers"
        raise JobError([Problem("model.args", config.args, rule, remedy)]) from error
    return model


def _require_fields(config: TransformersModel, defaults: Any) -> None:
    # transformers would keep an unknown field as an attribute and say nothing.
    unknown = [name for name in config.args if not hasattr(defaults, name)]
    problems = []
    for name in unknown:
        close = difflib.get_close_matches(name, defaults.to_dict(), n=1)
        remedy = f"did you mean {close[0]}?" if close else "remove it"
        rule = f"is not a field of the configuration of {config.model_type}"
        problems.append(Problem(f"model.args.{name}", config.args[name], rule, remedy))
    if problems:
        raise JobError(problems)


def _from_data(config: TransformersModel, facts: DataFacts, defaults: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if facts.num_classes is not None and config.auto_class.endswith("Classification"):
        values["num_labels"] = facts.num_classes
    if len(facts.shape) == 3:
        values |= {"num_channels": facts.shape[0], "image_size": facts.shape[1]}
    return {name: value for name, value in values.items() if hasattr(defaults, name)}
