"""The flags of `distill` for how parameters are updated."""

from __future__ import annotations

from typing import Any

from clipcid_cli.steps.settings.fields import option

OPTIMIZERS = ("muon", "adamw")


def optimizer_option(group: str) -> Any:
    """Declare the flag of the optimizer."""
    return option(
        "muon",
        "`muon` updates the layers of the towers by Muon, the rest by AdamW; `adamw` updates all by AdamW.",
        group=group,
        choices=OPTIMIZERS,
    )


def lr_option(group: str) -> Any:
    """Declare the flag of the peak learning rate."""
    return option(
        None,
        "Peak learning rate; by default it follows from losses, optimizer, batch and the student's width, and the run says "
        "how.",
        group=group,
        minimum=0.0,
        above_minimum=True,
    )


def decay_option(group: str) -> Any:
    """Declare the flag of weight decay."""
    return option(
        0.2,
        "Weight decay; not applied to norms, biases, scales and the parameters of losses.",
        group=group,
        minimum=0.0,
    )


def beta_option(group: str, value: float, what: str) -> Any:
    """Declare a flag of one of AdamW's decay rates."""
    return option(value, f"AdamW's decay rate of the {what}.", group=group, minimum=0.0, maximum=0.9999)


def eps_option(group: str) -> Any:
    """Declare the flag of AdamW's epsilon."""
    return option(1e-6, "AdamW's epsilon.", group=group, minimum=0.0, above_minimum=True)


def ema_option(group: str) -> Any:
    """Declare the decay of the average of the weights."""
    return option(
        None,
        "Also keep an exponential moving average of the student's weights with this decay, such as 0.999; it is evaluated "
        "beside the student and written to student-ema/, for `clipcid export --ema`. Takes 4 bytes per trained parameter.",
        group=group,
        minimum=0.0,
        above_minimum=True,
        maximum=0.999999,
        metavar="DECAY",
    )
