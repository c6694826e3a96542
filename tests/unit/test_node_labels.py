"""Labels of the config reach Ray; `python -m tests.labelled_nodes DIRECTORY` shows where things run then."""

from services.teacher.deployment import app
from services.teacher.schema import TeacherServiceConfig


def test_teacher_replicas_are_bound_to_the_labels_of_the_config():
    def options(**config):
        return app(TeacherServiceConfig(model="m", **config))._bound_deployment.ray_actor_options

    assert options(node_labels={"pool": "teacher"})["label_selector"] == {"pool": "teacher"}
    assert not options().get("label_selector")
