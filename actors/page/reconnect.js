// A socket that is opened again when it closes: connections break while a page is well, and its
// loaded models are worth more than a new page.

const DELAYS_MS = [0, 10, 25, 50, 100, 200, 400, 800]; // the last one is repeated
const GIVE_UP_MS = 10_000; // from the close on, and for the first opening
const REFUSED = 1008; // this page has been replaced, or another has its place

// Calls `opened(socket)` whenever the socket is open, `received(event)` for its messages, `closed()`
// when it closes, and once, at last, `ended()`: refused, or not opened for too long.
const nothing = () => {};
export function keepOpen(url, protocols, { opened = nothing, received, closed = nothing, ended }) {
  let since = performance.now();
  let tries = 0;

  function connect() {
    const socket = new WebSocket(url, protocols);
    socket.binaryType = "arraybuffer";
    let wasOpen = false;
    socket.onopen = () => {
      wasOpen = true;
      tries = 0;
      opened(socket);
    };
    socket.onmessage = (event) => received(event, socket);
    socket.onclose = ({ code }) => {
      if (wasOpen) {
        since = performance.now();
        closed();
      }
      if (code === REFUSED || performance.now() - since > GIVE_UP_MS) {
        ended();
        return;
      }
      setTimeout(connect, DELAYS_MS[Math.min(tries, DELAYS_MS.length - 1)]);
      tries += 1;
    };
  }
  connect();
}
