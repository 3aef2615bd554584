"""Where fewbit meets other libraries; nothing here acts on being imported."""
