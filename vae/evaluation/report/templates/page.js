"use strict";
const find = (id) => document.getElementById(id);
const cases = JSON.parse(find("cases").textContent);

// Every picture is in the page once, under "All pictures"; what shows it elsewhere takes it from there.
for (const image of document.querySelectorAll("img[data-of]")) image.src = find(image.dataset.of).src;

window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

if (cases.length) {
  const viewer = find("viewer");
  const sides = { left: find("left"), right: find("right") };
  const chosen = { left: null, right: null }; // labels, kept from image to image
  const thumbs = [...document.querySelectorAll(".strip button")];
  let current = 0;

  const move = () => viewer.querySelector(".compare").style.setProperty("--at", `${find("divider").value}%`);

  const put = (side) => {
    const picture = cases[current].pictures[sides[side].value];
    const image = find(`${side}-image`);
    image.src = find(picture.key).src;
    image.alt = `${picture.label} of ${cases[current].name}`;
    find(`${side}-tag`).textContent = picture.label;
  };

  const offer = (side, preferred) => {
    const { pictures } = cases[current];
    sides[side].replaceChildren(...pictures.map(({ label }, number) => new Option(label, number)));
    const kept = pictures.findIndex(({ label }) => label === chosen[side]);
    sides[side].value = Math.min(kept < 0 ? preferred : kept, pictures.length - 1);
    put(side);
  };

  const show = (number) => {
    current = (number + cases.length) % cases.length;
    find("title").textContent = cases[current].name;
    offer("left", Number(viewer.dataset.left));
    offer("right", Number(viewer.dataset.right));
    for (const [row, [, ...values]] of cases[current].numbers.entries())
      for (const [column, value] of values.entries()) {
        const cell = find(`n-${row}-${column}`);
        if (cell) cell.textContent = value;
      }
    thumbs.forEach((thumb, place) => thumb.setAttribute("aria-current", place === current));
    const strip = thumbs[current].parentElement;
    strip.scrollLeft = thumbs[current].offsetLeft - strip.offsetLeft - strip.clientWidth / 2 + 36;
  };

  for (const side of ["left", "right"])
    sides[side].addEventListener("change", () => {
      chosen[side] = cases[current].pictures[sides[side].value].label;
      put(side);
    });
  find("divider").addEventListener("input", move);
  find("previous").addEventListener("click", () => show(current - 1));
  find("next").addEventListener("click", () => show(current + 1));
  find("pixels").addEventListener("change", (event) => viewer.classList.toggle("pixelated", event.target.checked));
  thumbs.forEach((thumb, number) => thumb.addEventListener("click", () => show(number)));
  for (const card of document.querySelectorAll(".card"))
    card.addEventListener("click", () => {
      current = Number(card.dataset.case);
      const { pictures } = cases[current];
      chosen.right = pictures.find(({ key }) => key === card.dataset.picture).label;
      show(current);
      find("pictures").scrollIntoView();
    });
  show(0);
  move();
}
