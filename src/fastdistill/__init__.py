"Knowledge distillation: the heart, without any framework."
