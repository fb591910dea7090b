"""Rematerialised blocks run under their routing in the backward, too."""

from keras.src.backend.common import remat as rematerialising

from flix.backends.tensorflow.patches import remat


def test_keras_gets_its_own_function_back():
    remat.install()
    wrapped = rematerialising.remat
    remat.install()
    assert rematerialising.remat is wrapped
    try:
        remat.undo()
        assert rematerialising.remat is wrapped.flix_wrapped
        remat.undo()
        assert rematerialising.remat is wrapped.flix_wrapped
    finally:
        remat.install()
    assert rematerialising.remat.flix_wrapped is wrapped.flix_wrapped
