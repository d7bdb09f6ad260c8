addEventListener('load', () => {
  // What is wider than the page can be scrolled with the keyboard in every browser.
  document.querySelectorAll('pre > code, .md-typeset__scrollwrap, p:has(> img)').forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
  })
  // The theme has several landmarks without a name of their own.
  document.querySelectorAll('.md-code__nav').forEach((nav) => { nav.role = 'presentation' })
  document.querySelectorAll('nav nav[aria-labelledby]').forEach((nav) => {
    const title = document.getElementById(nav.getAttribute('aria-labelledby'))
    nav.ariaLabel = [title, nav.parentElement.closest('nav')?.querySelector('.md-nav__title')]
      .map((o) => o?.textContent.trim()).filter(Boolean).join(', ')
    nav.removeAttribute('aria-labelledby')
  })
  document.querySelectorAll('th:empty').forEach((th) => th.replaceWith(document.createElement('td')))
})
