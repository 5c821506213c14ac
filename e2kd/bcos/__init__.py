"""B-cos networks: networks whose weights W(x) on the image explain their logits."""

from e2kd.bcos.adapted import BatchNormActUncentered2d, EncodedConv2d, HeldAttention, NormaliseEncoded
from e2kd.bcos.attention import Attention
from e2kd.bcos.blocks import BasicBlock, Bottleneck
from e2kd.bcos.conversion import Change, Conversion, bcosify
from e2kd.bcos.convnext import BcosConvNeXt, convnext_base, convnext_large, convnext_small, convnext_tiny
from e2kd.bcos.convolution import BcosConv2d
from e2kd.bcos.densenet import BcosDenseNet, densenet121, densenet161, densenet169, densenet201
from e2kd.bcos.encoding import GELU, AddInverse, LogitLayer
from e2kd.bcos.linear import BcosLinear
from e2kd.bcos.loading import load_official
from e2kd.bcos.losses import BcosLoss, bcos_loss
from e2kd.bcos.mode import ExplanationMode, explanation_mode
from e2kd.bcos.norms import BatchNormUncentered2d, GroupNorm2d, LayerNorm, LayerNorm2d, PositionNorm2d
from e2kd.bcos.pooled import ConvClassifier, LinearClassifier, PooledNorm
from e2kd.bcos.rendering import contributions, render, render_contributions, save_explanation
from e2kd.bcos.resnet import (
    BcosResNet,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet152,
    resnext50,
)
from e2kd.bcos.vgg import BcosVGG, vgg11, vgg13, vgg16, vgg19
from e2kd.bcos.vit import SimpleViT, bcos_vit, vit_b, vit_l, vit_s, vit_ti, vitc_b, vitc_l, vitc_s, vitc_ti

__all__ = [
    "GELU",
    "AddInverse",
    "Attention",
    "BasicBlock",
    "BatchNormActUncentered2d",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosConvNeXt",
    "BcosDenseNet",
    "BcosLinear",
    "BcosLoss",
    "BcosResNet",
    "BcosVGG",
    "Bottleneck",
    "Change",
    "ConvClassifier",
    "Conversion",
    "EncodedConv2d",
    "ExplanationMode",
    "GroupNorm2d",
    "HeldAttention",
    "LayerNorm",
    "LayerNorm2d",
    "LinearClassifier",
    "LogitLayer",
    "NormaliseEncoded",
    "PooledNorm",
    "PositionNorm2d",
    "SimpleViT",
    "bcos_loss",
    "bcos_vit",
    "bcosify",
    "contributions",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "explanation_mode",
    "load_official",
    "render",
    "render_contributions",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet152",
    "resnext50",
    "save_explanation",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "vit_b",
    "vit_l",
    "vit_s",
    "vit_ti",
    "vitc_b",
    "vitc_l",
    "vitc_s",
    "vitc_ti",
]
