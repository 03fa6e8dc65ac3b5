// Before anything is painted: the theme that the reader chose last time, else that of the system.
try {
  const chosen = localStorage.getItem("temper-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // No storage here, as in MLflow's frame.
}
