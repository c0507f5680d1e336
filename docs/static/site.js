// Turn each `wipe` of two pictures into a slider; without this script both are seen, one below the other.
document.addEventListener("DOMContentLoaded", () => {
  for (const wipe of document.querySelectorAll(".wipe")) {
    const images = [...wipe.querySelectorAll("img")];
    if (images.length !== 2) continue;
    const pair = document.createElement("div");
    pair.className = "wipe-pair";
    for (const [i, image] of images.entries()) {
      const box = document.createElement("div");
      box.append(image);
      pair.append(box);
      const label = document.createElement("span");
      label.className = "wipe-label " + ["left", "right"][i];
      label.textContent = image.alt.split(":")[0];
      wipe.append(label);
    }
    const range = document.createElement("input");
    range.type = "range";
    range.value = 50;
    range.setAttribute("aria-label", images.map((image) => image.alt.split(":")[0]).join(", then "));
    range.addEventListener("input", () => wipe.style.setProperty("--at", range.value + "%"));
    wipe.querySelectorAll("p, a.image-reference").forEach((left) => left.remove());
    wipe.append(pair, range);
  }
});
