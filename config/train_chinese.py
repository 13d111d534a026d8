# A Chinese GPT with a tokenizer of its own, trained on Song lyric poems in a few minutes on two CPU cores.
#   python data/chinese/prepare.py
#   python train.py config/train_chinese.py
#   python sample.py --out_dir=out-chinese --start="水调歌头"
# For text of your own: python data/chinese/prepare.py --input FILES. Raise layers, width, context and steps
# with its size.

out_dir = 'out-chinese'
dataset = 'chinese'
eval_interval = 500
eval_iters = 0  # the whole validation set
log_interval = 25

arch = 'modern'
n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
sampling = 'documents'  # rows begin with a poem, so that the model learns to begin one

optimizer = 'muon'
matrix_lr = 0.04
learning_rate = 0.004
embedding_lr = 0.4
head_lr = 0.004
weight_decay = 0.0
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

max_iters = 1000
lr_schedule = 'wsd'
warmup_iters = 0
decay_fraction = 0.7
min_lr = 0.0
