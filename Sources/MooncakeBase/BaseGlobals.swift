import MooncakeSystem

/// Uses each global of this module and below once, as `Fork.prepare` asks for it.
package enum BaseGlobals {
  package static func use() {
    SystemGlobals.use()
    Log.prepare()
    Base64.prepare()
  }
}
