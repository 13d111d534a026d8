# Reach a validation loss of 1.4697 on tinyshakespeare in three minutes on two cores of a Xeon with AMX; other
# CPUs take longer. nanoGPT's GPU recipe ends there after three minutes on an A100.
#   python data/shakespeare_char/prepare.py
#   python train.py config/shakespeare_cpu.py
# Three seeds ended at 1.4479, 1.4494 and 1.4387 on the whole validation set. docs/RESULTS.md has the times
# and the search for sizes and rates.

out_dir = 'out-shakespeare-cpu'
dataset = 'shakespeare_char'
eval_interval = 1000
eval_iters = 0  # the whole validation set
log_interval = 50

arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = 'muon'
matrix_lr = 0.02
learning_rate = 0.004
embedding_lr = 0.4
head_lr = 0.002
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

max_iters = 2000
lr_schedule = 'wsd'
warmup_iters = 0
decay_fraction = 0.7
min_lr = 0.0
