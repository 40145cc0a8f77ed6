"""Train the student from the stored teacher."""
