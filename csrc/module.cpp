// The Python module `heatsink._C`. Importing it runs the static initialisers of the other files,
// which give the ops declared in Python their CPU implementation.

#include <Python.h>

#include <exception>

#include "interface.h"

namespace heatsink {
const char* instruction_set();
}

namespace {

PyObject* instruction_set(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(heatsink::instruction_set());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"instruction_set", instruction_set, METH_NOARGS,
                                   "The instruction set that products of bfloat16 run in."},
                                  {nullptr, nullptr, 0, nullptr}};
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                          "_C",
                                          "C++ implementations of heatsink's ops.",
                                          -1,
                                          methods,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddIntConstant(module, "INTERFACE", HEATSINK_INTERFACE) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
