"""What a distillation takes, on paper: sizes of models, figures of cards, and the arithmetic between them."""
