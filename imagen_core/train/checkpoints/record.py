"""What is recorded of a trained model besides its tensors: the types and ranges of each field."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from imagen_core.store.read.mixture_loader import check_state

_Count = Annotated[int, Field(ge=0)]
_Shapes = list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]]
_MOST_SHOWN = 60
"""Characters of a wrong value in a message."""


class _Record(BaseModel):
    """Unknown fields are those of a later version."""

    model_config = ConfigDict(strict=True, extra="allow")


class _FileRecord(_Record):
    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _EncoderRecord(_Record):
    name: str
    dim: Annotated[int, Field(ge=1)]
    dtype: str
    fingerprint: dict[str, Any]


_ONE, _SEVERAL = "one", "several"
_EncoderRecords = Annotated[
    Annotated[_EncoderRecord, Tag(_ONE)] | Annotated[list[_EncoderRecord], Field(min_length=1), Tag(_SEVERAL)],
    Discriminator(lambda value: _SEVERAL if isinstance(value, list) else _ONE),
]


class _LossScaleRecord(_Record):
    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: _Count


class _SettingsRecord(_Record):
    max_tokens: Annotated[int, Field(ge=1)]
    condition_images: dict[str, Annotated[int, Field(ge=1)]] = {}


class _BaseRecord(_Record):
    path: str
    step: _Count
    weights: str
    sha256: str


class LoraRecord(_Record):
    """What a checkpoint of an adapter says of it: `alpha` is a number, also where the configuration has null."""

    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    targets: list[str] | None
    base: _BaseRecord


class _ModelRecord(_Record):
    step: _Count
    denoiser: dict[str, Any]
    encoder: _EncoderRecords | None
    shapes: _Shapes = []


class StateRecord(_ModelRecord):
    """state.json of a checkpoint."""

    samples: _Count
    ema_updates: _Count
    power_since: _Count = 0
    files: dict[str, _FileRecord]
    loader: Annotated[dict[str, Any], AfterValidator(check_state)] | None
    config: _SettingsRecord
    embed_encoders: dict[str, _EncoderRecord] = {}
    loss_scale: _LossScaleRecord | None = None
    lora: LoraRecord | None = None
    teacher: dict[str, Any] | None = None


class ExportRecord(_ModelRecord):
    """The metadata of a model in one file."""

    weights: str
    max_tokens: Annotated[int, Field(ge=1)]
    embed_encoders: dict[str, _EncoderRecord]
    condition_images: dict[str, Annotated[int, Field(ge=1)]] = {}


def wrong_fields(record: type[_Record], value: object) -> list[str]:
    """`field: what is wrong` for each field of a JSON value that is missing, or of another type or range."""
    try:
        record.model_validate(value)
    except ValidationError as error:
        return [_described(item["loc"], item["type"], item["msg"], item.get("input")) for item in error.errors()]
    return []


def _described(location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    field = ".".join(str(part) for part in location if part not in (_ONE, _SEVERAL)) or "its content"
    if kind == "missing":
        return f"{field}: is missing"
    wrong = message.removeprefix("Value error, ")
    if kind == "value_error":
        return f"{field}: {wrong}"
    shown = repr(value)
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
    return f"{field}: {wrong[:1].lower()}{wrong[1:]} (got {shown})"
