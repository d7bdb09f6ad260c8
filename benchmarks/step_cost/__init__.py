"What distillation costs, side by side with other ways to do it."
