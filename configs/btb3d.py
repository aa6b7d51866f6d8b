"""BTB3D report generation: LoRA on LLaMA-3.1-8B-Instruct over 16x16x8 CT tokens (31,744 a volume, the pool bypassed).

    jaxmed train btb3d --model.base Llama-3.1-8B-Instruct --data.records train.json --data.embeddings encoded/ --out runs/btb3d

The values are those of the published README, with what it leaves broken mended: rows of 32,768 tokens (31,744 + 1,024 of text),
no `<im_patch>`, gradient clipping at 1, rematerialised blocks. Source: arXiv 2510.20639, ibrahimethemhamamci/BTB3D.
"""

from jaxmed.config import (
    DataConfig,
    Experiment,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ProjectorConfig,
    TrainConfig,
    VisualConfig,
)
from jaxmed.models.presets import LLAMA3_1_8B

ADDED_TOKENS = ("<pad>", "<multiple_choice>", "<long_answer>", "<short_answe>", "<report_generation>")


def get_config() -> Experiment:
    return Experiment(
        model=ModelConfig(
            decoder=LLAMA3_1_8B,
            projector=ProjectorConfig(kind="attn_pool+mlp2x_gelu"),
            added_tokens=ADDED_TOKENS,
        ),
        visual=VisualConfig(kind="embeddings", images=1, tokens=31744, features=18, grid=(31, 32, 32)),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
        optim=OptimConfig(learning_rate=2e-5, projector_learning_rate=2e-5),
        train=TrainConfig(epochs=100.0, seed=42, save_every=2000, remat="full"),
        data=DataConfig(batch=8, buckets=(32768, 33792), supervised=1024, template="llama3"),
    )
