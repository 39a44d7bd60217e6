"""The section about latents: numbers to copy, what each channel carries, how they are laid out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from vae.evaluation.report.charts import bars, lines, logarithms
from vae.evaluation.report.drawing import as_data, coloured, tiled
from vae.evaluation.report.wording import figure, significant

MATRIX_BYTES = 20_000

FACTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {  # title, what it means, from the statistics
    "scaling_factor": ("for the configuration of a diffusion model", lambda one: significant(one["scaling_factor"], 5)),
    "shift_factor": ("likewise", lambda one: significant(one["shift_factor"], 4)),
    "standard deviation": ("over all channels, noise of the posterior included", lambda one: significant(one["std"])),
    "KL": ("nats per latent element, mean over channels", lambda one: figure(one["kl"], 3)),
    "active channels": (
        "whose mean varies over the images by more than 0.01",
        lambda one: f"{one['active_channels']} of {len(one['kl_per_channel'])}",
    ),
    "effective rank": ("how many directions the channels really use", lambda one: figure(one["effective_rank"], 1)),
    "channel correlation": ("mean absolute", lambda one: figure(one["mean_absolute_correlation"], 3)),
    "autocorrelation": ("of neighbours 1, 2 and 4 cells apart", lambda one: _along(one["autocorrelation"])),
    "high to low frequencies": (
        "power per coefficient, upper over lower half",
        lambda one: significant(one["spectrum"]["high_to_low"], 3),
    ),
}


@dataclass(frozen=True)
class Channels:
    """Charts of one model; `deviations` has the mean of each channel beside its standard deviation."""

    model: str
    kl: Markup
    deviations: Markup
    correlation: str
    count: int


@dataclass(frozen=True)
class Latents:
    """`facts`: (title, meaning, a value for each of `models`)."""

    models: list[str]
    facts: list[tuple[str, str, list[str]]]
    spectrum: Markup
    channels: list[Channels]


def latent_section(document: dict[str, Any], dataset: str) -> Latents | None:
    every = list(document["models"])
    of_models = (document.get("latents") or {}).get(dataset) or {}
    known = {model: of_models[model] for model in every if of_models.get(model)}
    if not known:
        return None
    facts = [(title, meaning, [value(one) for one in known.values()]) for title, (meaning, value) in FACTS.items()]
    series = [_spectrum(known[model]["spectrum"]) if model in known else [] for model in every]
    words = "Radial power spectrum of the latents, one line for each model"
    chart = lines(series, "cycles per latent cell", "log10 power", words) if any(series) else Markup()
    return Latents(
        list(known), facts, chart, [_channels(model, every.index(model), one) for model, one in known.items()]
    )


def _channels(model: str, number: int, one: dict[str, Any]) -> Channels:
    kl, deviations = one["kl_per_channel"], one["latents_std"]
    correlation = np.array([[value or 0.0 for value in row] for row in one["correlation"]])
    return Channels(
        model,
        bars(kl, number, "KL of each channel in nats per element"),
        bars(deviations, number, "Standard deviation of each channel"),
        as_data(tiled(coloured(correlation)[None]), MATRIX_BYTES),
        len(kl),
    )


def _spectrum(one: dict[str, Any]) -> list[tuple[float, float]]:
    return logarithms((x, y) for x, y in zip(one["frequencies"], one["power"], strict=True) if y is not None)


def _along(lags: dict[str, float | None]) -> str:
    return ", ".join(figure(value, 2) for value in lags.values())
