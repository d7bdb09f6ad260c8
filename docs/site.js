// Code that is wider than the page can be scrolled with the keyboard in every browser.
document.querySelectorAll('pre > code').forEach((code) => {
  if (code.scrollWidth > code.clientWidth) code.tabIndex = 0
})
