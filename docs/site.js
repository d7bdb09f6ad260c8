// What is wider than the page can be scrolled with the keyboard in every browser.
addEventListener('load', () => {
  document.querySelectorAll('pre > code, .md-typeset__scrollwrap, p:has(> img)').forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
  })
})
