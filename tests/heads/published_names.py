"""Published names and keywords, for tests: A3-FPN of the authors' keywords, and mmsegmentation's names of UPerNet."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveal.heads.backbone import ShapeSpec
from foveal.heads.names import translate
from foveal.heads.necks import A3FPN
from foveal.heads.necks.published import load_published
from foveal.heads.segmentation.published import UPERNET


def from_published(config: Mapping[str, Any], state_dict: Mapping[str, Any], direction: str = "top_down") -> A3FPN:
    """The neck that the authors' ``A3FPN`` is with these keywords (github.com/mason-ching/A3-FPN), with its weights."""
    names = [name for part in ("state_dict", "model") for name in state_dict.get(part, ())] or list(state_dict)
    mmdet = any(name.endswith("conv44.conv.weight") for name in names)
    columns = len({name.partition("a3fpn_body.a3fpn_")[2][:1] for name in names if "a3fpn_body." in name})
    channels, outs, end = config["in_channels"], config.get("num_outs", 4 + mmdet), config.get("end_level", 4 + mmdet)
    spread = lambda value: [value] * len(channels) if isinstance(value, int) else list(value)  # noqa: E731
    dcn = {"offset_scale": 0.5, "dcn_output_bias": False, **config["dcn_config"]}
    neck = A3FPN(
        ShapeSpec(tuple(channels), tuple(4 * 2**i for i in range(len(channels)))),
        config["out_channels"],
        direction=direction,
        columns=columns,
        extra_levels=(outs > len(channels)) + max(end - outs, 0),
        start_level=max(end - outs, 0),
        squeeze=spread(config["squeeze"]),
        compress=config["compress_channel"],
        groups=config["group_num"],
        resampling=[bool(each) for each in spread(config["using_resampling"])[-columns:]],
        resampling_groups=spread(config["dcn_groups"]),
        expansion=config["expansion"],
        blocks=config["num_repblocks"],
        updated_first=direction == "bottom_up",
        offset_scale=dcn["offset_scale"],
        output_bias=dcn["dcn_output_bias"],
    )
    load_published(neck, state_dict)
    return neck


def to_mmseg(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The heads of a `Segmenter` with UPerNet and its own top-down path under mmsegmentation's names."""
    table = tuple((own, published) for published, own in UPERNET)
    named = {translate(name.replace(".norm.", ".bn."), table): tensor for name, tensor in state_dict.items()}
    return {name: tensor for name, tensor in named.items() if name is not None}
