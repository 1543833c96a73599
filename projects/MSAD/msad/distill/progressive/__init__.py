"""Progressive distillation: adaptation costs between networks, the order of the teachers, the stages that follow."""
