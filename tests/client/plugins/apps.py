"""Client apps for the plugins' tests."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import app as honest
from tofu.wire import SECURE


def forgetful_app(client: str, round_: int) -> ClientApp:
    """Our client app, but one client loses its state before it answers in one round."""
    app = ClientApp()
    app.query()(honest.hello)
    app.query(SECURE)(honest.secure)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if honest.client_name(context) == client and message.metadata.group_id == str(round_):
            for name in list(context.state):
                del context.state[name]
        return honest.train(message, context)

    return app
