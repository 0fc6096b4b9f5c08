from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import Net, datasets, train

app = ClientApp()


@app.train()
def train_handler(message: Message, context: Context) -> Message:
    parts, _ = datasets(int(context.node_config["num-partitions"]))
    data = parts[int(context.node_config["partition-id"])]
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = train(model, data, int(context.run_config["local-epochs"]), message.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
