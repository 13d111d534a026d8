# The loss of gpt2-large (n_layer=36, n_head=20, n_embd=1280: 774M parameters) on OpenWebText. nanoGPT
# publishes 2.67 for its validation split.
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2_large.py

batch_size = 8
eval_iters = 500  # many, for a precise estimate
eval_only = True
wandb_log = False
init_from = 'gpt2-large'
