# A character-level GPT on Shakespeare in two to four minutes of training on two CPU cores; on a GPU the
# same file runs faster.
#   python data/shakespeare_char/prepare.py
#   python train.py config/quickstart.py
#   python sample.py --out_dir=out-quickstart

out_dir = 'out-quickstart'
dataset = 'shakespeare_char'
eval_interval = 650
eval_iters = 0  # the whole validation set
log_interval = 25

arch = 'modern'
n_layer = 3
n_head = 2
n_embd = 128
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = 'muon'
normuon = True
matrix_lr = 0.025
learning_rate = 0.004
embedding_lr = 0.3
head_lr = 0.003
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

max_iters = 1300
lr_schedule = 'wsd'
warmup_iters = 0
decay_fraction = 0.7
min_lr = 0.0
