"""Distillation with Hugging Face's `Trainer`, and functions that build a student from the layers of
a teacher.
"""

try:
    import accelerate  # noqa: F401 (required by the Trainer)
    import transformers  # noqa: F401
except ImportError as e:
    raise ImportError(
        "fastdistill.huggingface needs transformers and accelerate: pip install 'fastdistill[hf]'"
    ) from e
from .student_from_layers import student_from
from .trainer import DistillationMixin, DistillationTrainer

__all__ = ['DistillationMixin', 'DistillationTrainer', 'student_from']
