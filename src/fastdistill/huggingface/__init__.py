"Distillation with Hugging Face's `Trainer`, and students made of their teacher's layers."

try:
    import accelerate  # noqa: F401 (the Trainer needs it)
    import transformers  # noqa: F401
except ImportError as e:
    raise ImportError(
        "fastdistill.huggingface needs transformers and accelerate: pip install 'fastdistill[hf]'"
    ) from e
from .student_from_layers import student_from
from .trainer import DistillationMixin, DistillationTrainer

__all__ = ['DistillationMixin', 'DistillationTrainer', 'student_from']
