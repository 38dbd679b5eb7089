"""The worlds that an agent can be trained in. They know nothing of the pipeline; `envs.py` lists them."""
