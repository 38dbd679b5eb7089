"""The worlds that an agent can be trained in. `envs.py` lists them. They do not import the pipeline."""
