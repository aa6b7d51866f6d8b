"""A small model trained from scratch on phantom chest CTs: the whole path on a laptop, in minutes.

    jaxmed quickstart

does it all: phantoms, tokens, this config's training, reports, scores. By hand, with the folders that quickstart leaves:

    jaxmed train quickstart --data.records quickstart/data/train.json --data.embeddings quickstart/tokens --out runs/q \
        --model.tokenizer quickstart/tokenizer

The tokens are 18 bands of a two-level 3-D Haar encoding, 4x3x3 neighbours merged: 32 tokens of 648 features a volume. Without
the fixed statistics (visual.norm) and the position table (visual.positions) the model does not see.
"""

from jaxmed.config import (
    DataConfig,
    DecoderConfig,
    EncodeConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    RopeConfig,
    TrainConfig,
    VisualConfig,
)

DECODER = DecoderConfig(
    vocab=128,
    width=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mlp=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    max_positions=128,
)


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(decoder=DECODER, projector=ProjectorConfig(kind="mlp2x_gelu"), dtype="float32"),
        visual=VisualConfig(tokens=32, features=648, grid=(2, 4, 4), merge=(4, 3, 3), norm=True, positions=True),
        lora=LoraConfig(rank=0),
        optim=OptimConfig(
            learning_rate=4e-3, weight_decay=0.05, b2=0.99, warmup_steps=40, final_fraction=0.02, max_grad_norm=1.0
        ),
        train=TrainConfig(steps=800, seed=0, trainable="all", remat="none", save_every=200, log_every=20, keep=2),
        data=DataConfig(batch=32, buckets=(96,), supervised=56, template="minimal"),
        encode=EncodeConfig(canvas=(48, 48, 32), spacing=(8.0, 8.0, 10.5), levels=(2, 2, 2)),
    )
