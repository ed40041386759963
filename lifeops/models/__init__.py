"""Hosts: small, readable models whose state dicts are timm's or the authors'."""

from lifeops.models.cvt import CvT, cvt
from lifeops.models.deit import VisionTransformer
from lifeops.models.dw_shortcut import dw_shortcut
from lifeops.models.edgevit import EdgeViT, edgevit
from lifeops.models.localvit import localvit
from lifeops.models.mvit import MViT, mvitv2
from lifeops.models.named import named
from lifeops.models.pvt import PyramidVisionTransformer
from lifeops.models.regionvit import RegionViT, regionvit
from lifeops.models.sit import SiT, sit
from lifeops.models.swin import SwinTransformer
from lifeops.models.swin_v2 import SwinTransformerV2, life_swinv2
from lifeops.models.t2t import T2T, life_t2t
from lifeops.models.tnt import TNT
from lifeops.models.vit_cait import CaiT, ViT

__all__ = [
    "T2T",
    "TNT",
    "CaiT",
    "CvT",
    "EdgeViT",
    "MViT",
    "PyramidVisionTransformer",
    "RegionViT",
    "SiT",
    "SwinTransformer",
    "SwinTransformerV2",
    "ViT",
    "VisionTransformer",
    "cvt",
    "dw_shortcut",
    "edgevit",
    "life_swinv2",
    "life_t2t",
    "localvit",
    "mvitv2",
    "named",
    "regionvit",
    "sit",
]
