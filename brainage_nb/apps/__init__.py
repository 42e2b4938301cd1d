"""For people: the notebook widget and the browser app."""
