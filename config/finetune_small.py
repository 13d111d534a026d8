# Instruction tuning of a small model of your own, whose tokenizer must have an end-of-text. The learning
# rates are those of docs/RESULTS.md. At the rate of config/finetune_dolly.py, meant for GPT-2, a small model
# learns almost nothing.
#   python data/dolly/prepare.py --tokenizer out-chinese/ckpt.pt --block_size 128
#   python train.py config/finetune_small.py --init_from=out-chinese/ckpt.pt
#   python sample.py --chat --out_dir=out-small

from config.finetune_dolly import *  # noqa: F403

out_dir = 'out-small'
init_from = 'out-chinese/ckpt.pt'

optimizer = 'muon'
matrix_lr = 0.02
embedding_lr = 0.2
learning_rate = 0.002
head_lr = 0.002
beta1 = 0.8
grad_clip = 0.0
lr_schedule = 'wsd'
decay_fraction = 0.7
