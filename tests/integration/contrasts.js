() => {
  // Texts whose contrast with the nearest ground behind them is below 4.5, as WCAG 2 counts it.
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.disabled || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    let behind = element, ground = [255, 255, 255];
    for (; behind; behind = behind.parentElement) {
      const color = rgb(getComputedStyle(behind).backgroundColor);
      if (color.length === 3 || color[3] > 0) { ground = color.slice(0, 3); break; }
    }
    const [one, other] = [light(rgb(getComputedStyle(element).color).slice(0, 3)), light(ground)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) found.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
}
