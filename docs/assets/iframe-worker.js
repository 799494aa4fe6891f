// Browsers start no workers for pages that are read from a folder; the search then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.ready = new Promise(resolve => {
        this.frame.addEventListener("load", () => {
          const scope = this.frame.contentWindow
          const load = address => new Promise(loaded => {
            const script = scope.document.createElement("script")
            script.src = address
            script.onload = loaded
            scope.document.head.append(script)
          })
          scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
          scope.importScripts = (...addresses) => Promise.all(addresses.map(load))
          load(url).then(() => resolve(scope))
        }, { once: true })
      })
      this.frame.srcdoc = "<!doctype html><title>search</title>"
      const attach = () => document.body.append(this.frame)
      document.body ? attach() : addEventListener("DOMContentLoaded", attach)
    }

    postMessage(data) {
      this.ready.then(scope => scope.dispatchEvent(new scope.MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
