"""The model families. Importing this package registers every model with timm."""

from __future__ import annotations

from . import (
    ascan,
    care,
    cswin,
    deit,
    fan,
    halonet,
    maxvit,
    moh_vit,
    nat,
    overlock,
    pvt,
    raftmlp,
    rmt,
    sgformer,
    shiftvit,
    stvit,
    swin,
    transnext,
    triplet,
    van,
)

_MODULES = (nat, halonet, care, maxvit, overlock, ascan, van, shiftvit, rmt, raftmlp, stvit, sgformer, transnext)
_MODULES += (moh_vit, triplet, fan, deit, pvt)
_MODULES += (swin, cswin)


def list_models() -> list[str]:
    """The names of all models registered by this package, sorted.

    Examples:
        >>> import foveal
        >>> "dinat_tiny" in foveal.list_models()
        True
    """
    return sorted(name for module in _MODULES for name in module.default_cfgs)


def family(name: str) -> str:
    """The display name of a model's family: ``family("dinat_s_tiny")`` is ``"DiNAT_s"``.

    Raises:
        ValueError: if the name is not one of `list_models`.

    Examples:
        >>> from foveal.backbones import family
        >>> family("dinat_s_tiny")
        'DiNAT_s'
    """
    for module in _MODULES:
        if name in module.default_cfgs:
            return module.family(name)
    raise ValueError(f"{name!r} is not a model of this package; see list_models()")


__all__ = ["family", "list_models"]
