# The loss of gpt2-xl (n_layer=48, n_head=25, n_embd=1600: 1558M parameters) on OpenWebText. nanoGPT
# publishes 2.54 for its validation split.
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2_xl.py

batch_size = 8
eval_iters = 500  # many, for a precise estimate
eval_only = True
wandb_log = False
init_from = 'gpt2-xl'
