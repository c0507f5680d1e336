// Show the two volumes of crop.js in NiiVue, turned and sliced together. Nothing is fetched.
document.addEventListener("DOMContentLoaded", async () => {
  const place = document.querySelector(".viewer");
  if (!place || !window.niivue) return;
  const volumes = [
    ["clinical.nii.gz", "clinical CT, 0.54 mm"],
    ["super_resolved.nii.gz", "super-resolved, 0.0675 mm"],
  ];
  place.innerHTML = '<div class="views"></div><div class="controls"></div>';
  const viewers = [];
  for (const [name, label] of volumes) {
    const figure = document.createElement("figure");
    figure.innerHTML = `<div class="view"><canvas tabindex="0" aria-label="${label}: drag to move the crosshair or turn"></canvas></div><figcaption>${label}</figcaption>`;
    place.querySelector(".views").append(figure);
    const viewer = new niivue.Niivue({
      backColor: [0, 0, 0, 1], isRadiologicalConvention: true, isNearestInterpolation: true,
      show3Dcrosshair: true, crosshairColor: [1, 0.78, 0, 0.7], crosshairWidth: 0.1, crosshairWidthUnit: "mm", isColorbar: false, loadingText: "",
    });
    await viewer.attachToCanvas(figure.querySelector("canvas"));
    const bytes = Uint8Array.from(atob(window.mmsrCrop[name]), (c) => c.charCodeAt(0));
    await viewer.loadFromArrayBuffer(bytes.buffer, name);
    viewer.volumes[0].cal_min = -1000;
    viewer.volumes[0].cal_max = 200;
    viewer.updateGLVolume();
    viewers.push(viewer);
  }
  viewers.forEach((one) => one.broadcastTo(viewers.filter((other) => other !== one), { "2d": true, "3d": true }));
  const controls = place.querySelector(".controls");
  const kinds = { "slices": "sliceTypeAxial", "three planes": "sliceTypeMultiplanar", "solid": "sliceTypeRender" };
  const windows = { "lung window": [-1000, 200], "soft tissue": [-160, 240] };
  const select = (label, choices, chosen) => {
    const box = document.createElement("label");
    box.textContent = label + " ";
    const list = document.createElement("select");
    for (const name of Object.keys(choices)) list.add(new Option(name));
    list.addEventListener("change", () => chosen(choices[list.value]));
    box.append(list);
    controls.append(box);
  };
  const slice = document.createElement("label");
  slice.innerHTML = 'slice <input type="range" min="0" max="1" step="0.001" value="0.4">';
  const move = () => viewers.forEach((one) => {
    one.scene.crosshairPos = [one.scene.crosshairPos[0], one.scene.crosshairPos[1], Number(slice.lastElementChild.value)];
    one.drawScene();
  });
  slice.lastElementChild.addEventListener("input", move);
  select("show", kinds, (kind) => viewers.forEach((one) => one.setSliceType(one[kind])));
  select("grey", windows, ([low, high]) => viewers.forEach((one) => {
    one.volumes[0].cal_min = low;
    one.volumes[0].cal_max = high;
    one.updateGLVolume();
  }));
  controls.append(slice);
  viewers.forEach((one) => one.setSliceType(one.sliceTypeAxial));
  move();
  place.dataset.ready = "true";
});
