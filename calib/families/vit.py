"""ViT, DeiT (distilled too), DINOv2: pre-norm transformers with packed qkv."""

from calib.families import Family
from calib.structure.moves import Insert, Norm, Value

FAMILY = Family(
    name="vit",
    networks=frozenset({"VisionTransformer", "VisionTransformerDistilled"}),
    modules=frozenset(
        {
            "PatchEmbed", "Block", "Attention", "Mlp", "SwiGLU", "SwiGLUPacked", "GluMlp", "LayerScale", "DropPath",
            "PatchDropout", "LayerNorm", "Linear", "Conv2d", "GELU", "SiLU", "Dropout", "Identity", "Sequential",
        }
    ),
    block=r"blocks\.\d+",
    float_layers=(
        (r"patch_embed\.proj", "the first layer: 3 input channels are too few for INT8, and its error reaches every layer"),
        (r"head|head_dist|fc_norm", "the last layer: <1 % of the time, and its error goes straight into the logits"),
    ),
    percentile=99.9999,  # a few huge activations per image carry the signal (DINOv2-S loses 14 dB at 99.99)
    moves=(
        Norm("Block", "norm1", "attn.qkv"),
        Norm("Block", "norm2", "mlp.fc1"),
        Value("Block", "attn.qkv", "attn.proj"),
        Insert("Block", "mlp.drop1", "mlp.fc2"),
    ),
    attention=r"blocks\.\d+\.attn",
    after_gelu=r"blocks\.\d+\.mlp\.fc2",
    channels_last=True,
    shared={"shared": "attn.qkv", "shared_mlp": "mlp.fc1"},
)  # fmt: skip
