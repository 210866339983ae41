"""A model behind Ray Serve: two ingress replicas, each with a Cluster of its own in its process.

    rayk example-model /tmp/tiny
    pip install 'ray[serve]' 'rayk[server]'
    serve run examples/serve/config.yaml      # http://127.0.0.1:8000/v1

RAYK_MODEL names another folder.
"""

import os

import rayk
from rayk.server import deployment

MODEL = os.environ.get("RAYK_MODEL", "/tmp/tiny")


def cluster() -> rayk.Cluster:
    return rayk.Cluster(MODEL, pages=256, threads=1)


app = deployment(cluster, ["tiny"], settings={"tool_parser": "hermes"}, ray_actor_options={"num_cpus": 0.5})
