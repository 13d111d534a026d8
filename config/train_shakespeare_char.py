# A small character-level GPT on Shakespeare with nanoGPT's settings, for experiments on one GPU.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
# On a CPU:
#   python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 \
#       --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 \
#       --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0

out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, because it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the best checkpoint is the result

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models tolerate a higher rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4  # learning_rate / 10
beta2 = 0.99  # few tokens a step
warmup_iters = 100
